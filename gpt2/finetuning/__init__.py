"""Fine-tuning: what a trained model learns besides. The model itself knows nothing of it."""
