"""The losses of other libraries, with their calls and values, computed by `fused_svr_loss`.

None of these modules imports the library it serves. Each takes the support vectors' options as well
(`radius`, `bilateral`, `alpha`, ...); without a radius the value is the library's own.
"""
