"""From prompts to tokens to text: rows, batches, the decode loop, sampling, beams, drafts."""
