"""Study files: what is refused, what they stand for, and that the older commands stand for one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE
from helpers.stores import write_checkpoint
from helpers.study_makers import KINDS, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.options import EvaluateOptions
from vaevq_med.study.bundle import Bundle, literal, texts
from vaevq_med.study.command import RunStudy
from vaevq_med.study.file import GeneratorStudy, Report, TokenizerStudy, check_study, read_study
from vaevq_med.study.methods import make_methods
from vaevq_med.study.rows import check_settings
from vaevq_med.tokens.options import EncodeOptions

STUDIES = sorted(path.stem for path in (BUNDLE.parent / "studies").glob("*.yaml"))
TOKENIZERS = {"study": "tokenizers", "output": "out", "methods": ["vqgan", "simvq"], "tracking_uri": "none"}
GENERATORS = {
    **{"study": "generators", "output": "out", "tokenizers": {"vqgan": "a.pt"}},
    "generators": [{"name": "llamagen", "config": "train_autoregressive.json"}],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def tokenizers(**changes: Any) -> dict[str, Any]:
    return TOKENIZERS | changes


def generators(**changes: Any) -> dict[str, Any]:
    return GENERATORS | changes


# --- the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("3", "study is missing; expected tokenizers, generators, rate_distortion or tasks"),
        ("study: [a]", 'study is ["a"]; expected tokenizers, generators, rate_distortion or tasks'),
        ("study: {a: 1}", 'study is {"a": 1}; expected tokenizers, generators, rate_distortion or tasks'),
        ("? [a, b]\n: 1", "line 1 has"),
        ("study: tokenizers\nset: {2024-01-01: 1}", "line 2 has 2024-01-01; expected a name"),
        ("study: tokenizers\nset: {1: 1, 0x1: 2}", "line 2 repeats 0x1; expected each name once"),
        ("study: tokenizers\nset: &a {x: *a}", "found no plain value"),
        ("study: tokenizers\nset: {x: !!bool maybe}", "found a value that is none of its kind"),
        ("[" * 3000, "lists too deep"),
        (
            {"study": "tokenizers", "output": "o", "methods": ["table.md"]},
            "which the output folder has for something else",
        ),
        (
            {"study": "tokenizers", "output": "o", "methods": ["Study.YAML"]},
            "which the output folder has for something",
        ),
        (tokenizers(study="losses"), 'study is "losses"; expected tokenizers, generators, rate_distortion or tasks'),
        (tokenizers(bugdet=3), "bugdet is unknown; expected budget"),
        (tokenizers(**{"sam{p}les": 3}), "sam{p}les is unknown; expected"),
        (tokenizers(budget={"step": 3}), "budget.step is unknown; expected steps"),
        (tokenizers(budget={"steps": 3, "images": 4}), "budget is steps and images; expected one of max_epochs, steps"),
        (tokenizers(budget={"steps": 0}), "budget.steps is 0; expected 1 or more"),
        (tokenizers(budget={"steps": "many"}), 'budget.steps is "many"; expected a whole number'),
        (tokenizers(budget={"steps": 1.5}), "budget.steps is 1.5; expected a whole number"),
        (tokenizers(seeds=[True]), "seeds[0] is true; expected a whole number"),
        (tokenizers(seeds=[0, 0]), "seeds is [0, 0]; expected 0 once"),
        (tokenizers(seeds=[-1]), "seeds[0] is -1; expected at least 0"),
        (tokenizers(seeds={}), "seeds is {}; expected a list"),
        (tokenizers(methods=[]), "methods is []; expected at least 1 item"),
        (tokenizers(methods=["vqgan", 3]), "methods[1] is 3; expected a mapping"),
        (tokenizers(methods=["vqgan", "vqgan"]), "methods is a list with vqgan more than once; expected each name"),
        (tokenizers(methods=[{"name": "a", "overlay": ["b"]}]), "methods[0].overlay is unknown; expected overlays"),
        (tokenizers(methods=[{"name": "a/b"}]), "methods[0].name is \"a/b\"; expected letters, digits, '_', '-'"),
        (tokenizers(set=["a=b"]), 'set is ["a=b"]; expected a mapping'),
        (tokenizers(launch={"torchrun": 8}), 'launch is {"torchrun": 8}; expected a list'),
        (tokenizers(sweep={"num_embeddings": [1]}), "sweep.num_embeddings[0] is 1; expected at least 2"),
        (tokenizers(checkpoint="worst"), "checkpoint is \"worst\"; expected 'best' or 'last'"),
        (tokenizers(report={"pictures": -1}), "report.pictures is -1; expected at least 0"),
        ({"study": "tokenizers", "methods": ["a"]}, "output is missing; expected it"),
        ({**GENERATORS, "tokenizers": None}, "tokenizers is null; expected a mapping"),
        ({k: v for k, v in GENERATORS.items() if k != "tokenizers"}, "tokenizers is missing; expected it"),
        (generators(tokenizers={}), "tokenizers.methods is []; expected at least 1 item"),
        (generators(tokenizers={"from": "out"}), "tokenizers.methods is missing"),
        (generators(tokenizers={"from": "out", "methods": [{"name": "a", "checkpoint": "b"}]}), "a with both of"),
        (generators(tokenizers={"llamagen": "a.pt"}), "tokenizers has llamagen, which is a generator's name"),
        (generators(generators=["llamagen"]), 'generators[0] is "llamagen"; expected a mapping'),
        (generators(evaluate={"neighbours": 3}), "evaluate.neighbours is unknown; expected neighbors"),
        (generators(evaluate={"neighbors": "3"}), 'evaluate.neighbors is "3"; expected a whole number'),
        (generators(encode={"split": ["train"]}), "encode.split[0] is \"train\"; expected 'training', 'validation' or"),
        (
            generators(tokenizers={"a": {"checkpoint": "b", "encode": {"flip": 3}}}),
            "encode.flip is 3; expected true",
        ),
        ("study: tokenizers\nseeds: [0]\nseeds: [1]\n", "line 3 repeats seeds; expected each name once"),
        ("study: tokenizers\nbudget:\n  steps: 1\n  steps: 2\n", "line 4 repeats steps"),
        ("study: [tokenizers\n", "line 2 is no YAML"),
        ("study: !!python/name:os.system\n", "line 1 is no YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_place(content: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", content)
    with pytest.raises(VaevqMedError) as refused:
        read_study(str(file))
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            tokenizers(methods=["vgqan"]),
            "expected a file of overlays/; did you mean 'vqgan'",
        ),
        (tokenizers(methods=[{"name": "a", "overlays": ["nowhere.json"]}]), "found no overlay 'nowhere.json'"),
        (tokenizers(set={"learning_rat": 1}), "did you mean 'learning_rate'"),
        (tokenizers(set={"seed": 1}), "found 'seed', which the comparison sets itself"),
        (tokenizers(methods=[{"name": "simvq", "readouts": ["hard"]}]), "the read-out 'hard', expected none"),
        (tokenizers(methods=[{"name": "softvq", "readouts": ["loud"]}]), "expected of soft, hard"),
        (tokenizers(report={"figures": ["psnr", "gfid"]}), "report.figures has gfid; expected some of psnr"),
        (tokenizers(bundle="bratz"), "expected one of brats, imagenet"),
        (generators(), "tokenizer vqgan, seed 0: found no checkpoint a.pt"),
        (generators(generators=[{"name": "l", "config": "train.json"}]), "expected a class derived from Generator"),
        (generators(generators=[{"name": "l", "config": "nowhere.json"}]), "found no nowhere.json"),
    ],
)
def test_what_no_row_could_run_with_is_refused_before_anything_is_written(
    content: Any, said: str, tmp_path: Path, slice_dataset: Path
) -> None:
    study = check_study({**content, "output": str(tmp_path / "out"), "dataset_dir": str(slice_dataset)}, "mine")
    with pytest.raises(VaevqMedError) as refused:
        RunStudy(study).dry_run()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_fields_are_set_on_the_command_line(tmp_path: Path) -> None:
    file = str(write(tmp_path / "mine.yaml", TOKENIZERS))
    assignments = (
        "output=else where",
        "budget.steps=3",
        "set.network_def#encoder#a.b=1e-3",
        "methods.1.title=Sim VQ",
    )
    study = read_study(file, (*assignments, "seeds=[1, 2]", "methods.0={name: fsq, set: {batch_size: 2}}"))
    assert isinstance(study, TokenizerStudy)
    assert (str(study.output), study.budget.steps, study.seeds) == ("else where", 3, [1, 2])
    assert texts(study.set) == {"network_def#encoder#a.b": "1e-3"}
    assert (study.methods[0].name, study.methods[1].title) == ("fsq", "Sim VQ")
    for text, said in (
        ("output", "set is 'output'; expected FIELD=VALUE"),
        ("methods.7.title=a", "set is 'methods.7.title=a'; expected a field"),
        ("output.a=b", "set is 'output.a=b'; expected a field"),
        ("seeds=[", "set is 'seeds=['; expected a field"),
        ("learning_rate=1", "learning_rate is unknown"),
    ):
        with pytest.raises(VaevqMedError) as refused:
            read_study(file, [text])
        assert said in str(refused.value)


def test_a_study_is_found_by_its_name_or_its_path() -> None:
    with pytest.raises(VaevqMedError, match=r"found no bundles/studies/table9\.yaml, expected one of ablation"):
        read_study("table9")
    with pytest.raises(VaevqMedError, match=r"found no file table1\.yaml, expected a study"):
        read_study("table1.yaml")


@pytest.mark.parametrize("name", STUDIES)
def test_a_bundled_study_is_one(name: str, tmp_path: Path, slice_dataset: Path) -> None:
    study = read_study(name, [f"output={tmp_path / 'out'}"])
    assert study.label == name
    assert check_study(yaml.safe_load(study.text()), "again") == study
    if isinstance(study, TokenizerStudy):
        plan = RunStudy(read_study(name, [f"output={tmp_path / 'out'}", f"dataset_dir={slice_dataset}"])).plan
        check_settings(plan)
        titles = [method.title for method in plan.methods]
        assert [title for title in titles if title == title.lower()] == []
        assert len(set(titles)) == len(titles)


DOCS = (BUNDLE.parents[1] / "docs" / "studies.md").read_text()


def test_the_documented_studies_are_such(slice_dataset: Path) -> None:
    first, second = (
        check_study(yaml.safe_load(block), "docs") for block in re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    )
    assert isinstance(first, TokenizerStudy)
    assert isinstance(second, GeneratorStudy)
    plan = RunStudy(first.model_copy(update={"dataset_dir": slice_dataset})).plan
    assert [method.name for method in plan.methods] == ["vqgan", "vaevq_map", "softvq", "softvq_hard"]
    assert [column.name for column in plan.columns()] == ["psnr", "ssim", "rfid", "utilization"]


@pytest.mark.parametrize("kind", [TokenizerStudy, GeneratorStudy, Report])
def test_every_field_is_documented(kind: type[BaseModel]) -> None:
    assert [name for name in kind.model_fields if f"`{name}`" not in DOCS] == []


def test_values_reach_the_run_as_they_are_written() -> None:
    written = yaml.safe_load("{a: 1e-3, b: 0.5, c: true, d: null, e: [1, x], f: $@a + 1, g: '1', h: hard}")
    read = {key: literal(text) for key, text in texts(written).items()}
    assert read == {"a": 1e-3, "b": 0.5, "c": True, "d": "$None", "e": [1, "x"], "f": "$@a + 1", "g": 1, "h": "hard"}


# --- methods ----------------------------------------------------------------------------------------


def test_a_method_is_named_by_its_overlay_or_by_the_study(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "brats")
    (tmp_path / "brats/overlays").mkdir()
    (tmp_path / "brats/overlays/cosine.json").write_text(json.dumps({"_title_": "CosineVQ", "max_epochs": 3}))
    outside = tmp_path / "outside.json"
    shutil.copy(tmp_path / "brats/overlays/cosine.json", outside)
    parts = ["cosine", {"name": "mine", "overlays": ["vqgan", str(outside)]}, {"name": "vqgan", "title": "Ours"}]
    study = check_study(tokenizers(methods=parts, bundle=str(tmp_path / "brats"), overlays=["small_cpu"]), "mine")
    plan = RunStudy(study).plan
    assert [method.title for method in plan.methods] == ["CosineVQ", "mine", "Ours"]
    (files,) = [line for line in plan.rows()[1].commands()["training"] if line.startswith("[")]
    assert [Path(file).name for file in literal(files)] == [
        "train.json",
        "small_cpu.json",
        "vqgan.json",
        "outside.json",
    ]


def test_a_study_chooses_the_read_outs_that_have_a_row() -> None:
    bundle = Bundle.find("brats")
    for chosen, names in ((None, ["softvq", "softvq_hard"]), ([], ["softvq"]), (["hard"], ["softvq", "softvq_hard"])):
        study = check_study(tokenizers(methods=[{"name": "softvq", "readouts": chosen}]), "mine")
        assert isinstance(study, TokenizerStudy)
        assert [method.name for method in make_methods(study, bundle)] == names


# --- the command ------------------------------------------------------------------------------------


def test_a_dry_run_prints_commands_and_writes_nothing(slice_dataset: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", tokenizers(output=str(tmp_path / "out"), dataset_dir=str(slice_dataset)))
    done = CliRunner().invoke(app, ["study", str(file), "--dry-run", "--set", "seeds=[0, 7]"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[::3] == ["# vqgan seed 0", "# simvq seed 0", "# vqgan seed 7", "# simvq seed 7"]
    assert all(" -m monai.bundle run training " in line for line in lines[1::3])
    assert not (tmp_path / "out").exists()


def test_a_script_of_tasks_runs_the_study_that_stands_in_its_folder(slice_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    file = write(tmp_path / "mine.yaml", tokenizers(name="mine", output=str(output), dataset_dir=str(slice_dataset)))
    done = CliRunner().invoke(app, ["study", str(file), "--slurm", str(tmp_path / "s.sh"), "--set", "seeds=[0, 7]"])
    assert done.exit_code == 0, done.output
    script = (tmp_path / "s.sh").read_text()
    assert "#SBATCH --job-name=vaevq-mine\n#SBATCH --array=0-3\n" in script
    assert f' study {output / "study.yaml"} --task "$SLURM_ARRAY_TASK_ID"\n' in script
    assert read_study(str(output / "study.yaml")) == read_study(str(file), ["seeds=[0, 7]"])
    done = CliRunner().invoke(app, ["study", str(output / "study.yaml"), "--task", "4"])
    assert str(done.exception) == "row or task 4: expected 0 to 3"


def test_overlays_of_generators_are_names_of_one_or_of_all_or_paths(slice_dataset: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside.json", '{"learning_rate": 0.5}')
    file = str(write_checkpoint(tmp_path / "a.pt"))
    parts = [
        {"name": "llamagen", "config": "train_autoregressive.json", "overlays": ["s"]},
        {"name": "ldm", "config": "train_diffusion.json", "set": {"learning_rate": 2e-5}},
    ]
    content = generators(
        **{"tokenizers": {"a": file}, "generators": parts, "overlays": ["small_cpu", str(outside)]},
        **{"output": str(tmp_path / "out"), "dataset_dir": str(slice_dataset)},
    )
    llamagen, ldm = RunStudy(check_study(content, "mine")).plan.methods
    assert llamagen.overlays == ("autoregressive_small_cpu", str(outside), "autoregressive_s")
    assert ldm.overlays == ("diffusion_small_cpu", str(outside))
    for name in ("bogus", "autoregressive_small_cp"):
        parts[0]["overlays"] = [name]
        with pytest.raises(VaevqMedError, match=f"found no overlay '{name}'"):
            RunStudy(check_study(content, "mine")).dry_run()


def test_rows_of_generators_have_names_of_their_own(tmp_path: Path) -> None:
    file, config = str(write_checkpoint(tmp_path / "a.pt")), "train_autoregressive.json"
    parts = [{"name": "b_c", "config": config}, {"name": "c", "config": config}]
    content = generators(tokenizers={"a": file, "a_b": file}, generators=parts, output=str(tmp_path / "out"))
    with pytest.raises(VaevqMedError, match="make a_b_c twice"):
        RunStudy(check_study(content, "mine")).dry_run()


def test_generators_have_no_tasks(slice_dataset: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.pt")
    content = generators(tokenizers={"a": str(checkpoint)}, output=str(tmp_path), dataset_dir=str(slice_dataset))
    with pytest.raises(VaevqMedError, match="study is generators, whose rows share token stores"):
        RunStudy(check_study(content, "mine")).script()


def test_one_item_is_a_list_of_it() -> None:
    report = {"figures": "psnr", "notes": "One sentence, with a comma."}
    given = tokenizers(
        methods="vqgan", seeds=3, overlays="small_cpu", launch="torchrun --nproc-per-node 2", report=report
    )
    study = check_study(given, "mine")
    listed = {"methods": ["vqgan"], "seeds": [3], "overlays": ["small_cpu"]}
    listed |= {"launch": ["torchrun", "--nproc-per-node", "2"], "report": {name: [one] for name, one in report.items()}}
    assert study == check_study(tokenizers(**listed), "mine")
    options = {"encode": {"split": "training"}, "evaluate": {"modality": "t1n"}}
    study = check_study(generators(**options), "mine")
    assert isinstance(study, GeneratorStudy)
    assert (study.encode, study.evaluate) == ({"split": ["training"]}, {"modality": ["t1n"]})
    # From Python too.
    assert EncodeOptions(split="test").split == ["test"]  # type: ignore[arg-type]
    assert EvaluateOptions(modality="t1n").modality == ["t1n"]  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match=r"mine: .*launch is"):
        check_study(tokenizers(launch="torchrun 'a"), "mine")


# --- the older commands -----------------------------------------------------------------------------

IDS = st.sampled_from(["learning_rate", "batch_size", "network_def#encoder#num_channels", "warmup_steps"])
TEXTS = st.sampled_from(["1e-3", "2", "0.50", "True", "None", "[1, 2]", "(1, 2)", "{'a': 1}", "$@a + 1", "x y", "'1'"])
OPTIONS = st.fixed_dictionaries(
    {"methods": st.sampled_from(["vqgan", "vaevq,softvq", "mine=simvq+vlq,fsq"])},
    optional={
        "seeds": st.lists(st.integers(0, 9), min_size=1).map(lambda seeds: ",".join(map(str, seeds))),
        "steps": st.integers(1, 10**6),
        "overlays": st.just(["small_cpu"]),
        "values": st.dictionaries(IDS, TEXTS),
        "launch": st.sampled_from(["", "torchrun --nproc_per_node=2", "nice 'a b'"]),
        "checkpoint": st.sampled_from(["best", "last"]),
        "published": st.booleans(),
        "pictures": st.integers(0, 3),
    },
)


@given(OPTIONS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flags_and_the_file_they_stand_for_are_one_plan(slice_dataset: Path, options: dict[str, Any]) -> None:
    values = options.pop("values", {})
    first = options["methods"].split(",")[0].split("=")[0]
    assignments = [f"{key}={value}" for key, value in values.items()]
    assignments += [f"{first}:{key}={value}" for key, value in values.items()]
    made = make("compare", Path("out"), assignments=assignments, dataset_dir=slice_dataset, **options)
    read = RunStudy(check_study(yaml.safe_load(made.study.text()), "again"))
    assert read.study == made.study
    assert read.plan == made.plan
    # What is typed is what the runs are given.
    given = {key: "$None" if value == "None" else value for key, value in values.items()}
    assert texts(made.study.set) == given
    assert dict(made.plan.methods[0].overrides) == given
    assert [row.commands() for row in read.plan.rows()] == [row.commands() for row in made.plan.rows()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_shows_the_study_it_stands_for(kind: str, slice_dataset: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a.pt")
    own = {
        "sweep": ["--num-embeddings", "16,64"],
        "compare-generation": [
            *("--tokenizers", f"vqgan={checkpoint},vaevq={checkpoint}", "--encode", "ldm: --dtype float32 --no-flip"),
            *("--encode", "--split training --split test", "--generate-set", "ldm:num_steps=5"),
            *("--evaluate", "--neighbors 5 --cache-dir 'a b' --no-memorization"),
        ],
    }
    command = [kind, *own.get(kind, []), "--dataset-dir", str(slice_dataset), "--output-dir", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*command, "--show-study"])
    assert shown.exit_code == 0, shown.output
    file = write(tmp_path / "shown.yaml", shown.output)
    typed, read = (CliRunner().invoke(app, [*words, "--dry-run"]) for words in (command, ["study", str(file)]))
    assert typed.exit_code == 0, typed.output
    assert typed.output == read.output
    if kind == "compare-generation":
        assert "--split training --split test --dtype float32" not in typed.output
        assert "--split training --split test --no-flip --dtype float32" in typed.output
        assert "--neighbors 5 --no-memorization --cache-dir 'a b'" in typed.output
        assert " --tokenizer " not in typed.output
