"""int8: layers whose weights take a byte each, the products that they compute, and the swap of a model's layers."""
