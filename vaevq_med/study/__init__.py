"""What ``vaevq-med compare``, ``ablate`` and ``sweep`` share: rows, their run, their statistics, tables and figures."""
