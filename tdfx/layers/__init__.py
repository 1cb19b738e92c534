"""The modules that hold factors, and the tools that copy modules and place tensors."""
