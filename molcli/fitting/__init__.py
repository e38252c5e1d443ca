"""Fit thin blocks and mixers to what a dense layer computes.

The way of a parent's layer to a converted one, in the order of the steps:

1. `partition`: which heads and neurons each thin block takes over.
2. `chunks`, `residuals`: the text as packed rows, and the residuals before the layer.
3. `projection`: fold the norms into a part's weights and project them to a thin width.
4. `targets`: what the dense layer computes on the text.
5. `thin_blocks`: least squares that fit blocks to those targets.
6. `layer`: one dense layer becomes one Mixture of Layers layer; `baselines` does so without a fit.
"""
