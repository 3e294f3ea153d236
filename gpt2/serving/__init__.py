"""An HTTP server with OpenAI's API on `generation.Batch`: engine (who runs when), protocol (JSON and requests), app."""
