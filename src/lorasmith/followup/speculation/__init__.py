"""Whether speculative decoding with a draft model pays."""
