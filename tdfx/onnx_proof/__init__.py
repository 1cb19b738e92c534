"""Proving by ONNX that two models are the same, and exporting a model with such a proof.

The files in the order of the work, which starts in two public functions:

- ``verify``: ``tdfx.verify``. ``export_model``: ``tdfx.export``. ``report``: what they return.

From a module to a file:

- ``module_inputs``: example inputs as ``forward`` takes them, and dynamic axes
- ``plain_forward``: modules that take or give more than tensors, as ones that take and give tensors only
- ``factor_chains``: which nodes are chains of factors, stored as metadata of the file
- ``alias_groups``: the names of tensors that the model holds more than once, stored there too
- ``torch_to_onnx``: torch's exporter
- ``check_export``: the check that an exported file does what its module does

From a file to a graph:

- ``value_text``: tensors and attributes as text, by which they are compared
- ``graph``: the parts of an ONNX model that are compared
- ``onnx_file``: reading a file

Comparing two graphs, and two files:

- ``first_names``: the same name on both sides for a tensor that has several
- ``chain_geometry``, ``contract_chains``: each chain of factors becomes one node, as the layer that it replaces
- ``compare_interface``: opsets, stored tensors, inputs and outputs
- ``walk_from_outputs``, ``isomorphism``: the nodes
- ``first_difference``: where two graphs differ, as a sentence and as a drawing
- ``compare_graphs``: all of these
- ``graph_inputs``, ``compare_outputs``: the numbers, in ONNX Runtime

Nothing here imports onnx before ``verify`` or ``export`` is called.
"""
