"""What commands in a terminal share: output, models, prompts."""
