"""Model formats: ONNX, torch.export and the hub."""
