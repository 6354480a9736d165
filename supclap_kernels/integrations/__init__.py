"""The losses of other libraries, with their calls and values, computed by `fused_svr_loss`.

None of these modules imports the library it serves. Each takes the support vectors' options as well
(`radius`, `bilateral`, `alpha`, ...); without a radius the value is the library's own.

Trainers that give their optimizer the model alone train the radius once it hangs on the model:
`attach_radius(model, StaticRadius(1.0))` (`examples/` has a script for each trainer).
"""
