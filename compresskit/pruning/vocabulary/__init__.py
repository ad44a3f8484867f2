"""`prune vocabulary`: tokens that a text never needs leave the tokenizer, the embedding and the head."""
