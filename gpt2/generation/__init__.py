"""Text generation: rows, batches, the decode loop, sampling, beam search and speculative decoding."""
