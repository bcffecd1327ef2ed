"""From a fine-tuned checkpoint to an artifact and back."""
