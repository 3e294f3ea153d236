"""The numbers that the kernels for bytes go by. A file of their own: TorchScript sees a module's numbers, but no globals."""

# The kernel's steps are never finer than FINEST, so what it multiplies is lifted first and the scales of the weights are
# lowered. LIFT is a power of two, which changes no bits of a product but the exponent.
LIFT = 1024.0
FINEST = 6.1e-5

# The smallest normal number of float32.
TINY = 2.0**-126

# In units of the last place that a weight of a row can have: with sums and biases up to this, what is lost in a product in
# float32, less the bias, over the unit, is less than half a unit. 3 * 2^-24 of the sum, and 2^-24 of the bias.
LARGEST_SUM = LARGEST_BIAS = 2e6
