"""Loading, saving, typing and cleaning ONNX graphs, over onnx-graphsurgeon."""
