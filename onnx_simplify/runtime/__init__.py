"""Everything that runs a model in onnxruntime: sessions, inputs, measurement, verification."""
