"""int8 quantization: layers with one byte per weight, their matrix products, and the replacement of a model's layers."""
