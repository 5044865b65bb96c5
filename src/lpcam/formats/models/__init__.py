"""Model formats: ONNX and the hub."""
