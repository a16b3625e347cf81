"""Where a model is: a URL, a Hugging Face repository or a directory."""
