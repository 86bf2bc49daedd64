"""What several test modules need: small random models, the Hugging Face oracle, a model that cannot hide a paging bug."""
