"""After the release: responses, a draft model, speculative decoding, compression, chat."""
