"""The parts of ``tdfx.verify``: exporting, comparing graphs, running them; imported only when it is called."""
