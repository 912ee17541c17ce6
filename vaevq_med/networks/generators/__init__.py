"""Networks over tokens and latents, and how they draw."""
