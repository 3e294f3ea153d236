"""The same tokens, sooner. Delete it and they come, slower."""
