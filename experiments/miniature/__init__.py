"""The miniature's own parts: its tokenizer, language model and autoencoder, each trained in about a minute."""
