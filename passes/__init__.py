"""The compiler, imported as ``tdfx.passes``: from a model and a policy to a plan, to a factorized model, and back.

The passes, in the order in which ``pipeline`` runs them:

1. ``Trace`` (analysis) records the graphs of as much of the model as torch.fx can follow, on a structural copy.
2. ``Find`` (analysis) lists the sites: every place that computes a convolution or a linear map, or why it must be kept.
3. ``ObserveInputs`` (analysis), with example inputs: what flows into each site, and the sites that only a run shows.
4. ``TimeStep`` (planning), for a budget of time: how long the whole training step takes.
5. ``AttachMetric`` (planning), with moments of a few training steps: what errors of each weight are measured in.
6. ``Select`` (planning) decides a scheme and ranks for each site. It is the first that reads the weights' values.
7. ``Rewrite`` (transform) puts factors in the place of the weights. All checks have passed before it begins, and it builds
   another module, so that a failure changes nothing; the optimizer follows after it, in ``tdfx.optim``.
8. ``Merge`` (transform), at the end of the training, multiplies the factors out.

README.md explains the pipeline and how to add a pass; ``base`` has the contract that every call checks.
"""
