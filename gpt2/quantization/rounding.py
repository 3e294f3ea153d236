"""Constants of the int8 kernels, in a separate module, because TorchScript can read numbers of a module, but no globals."""

# The smallest step to which the kernel rounds inputs.
FINEST = 6.1e-5

# Inputs are multiplied by this factor, and the scales of weights are divided by it, so that small inputs are not limited by
# FINEST. It is a power of 2, so only exponents change.
LIFT = 1024.0

# The smallest normal number of float32.
TINY = 2.0**-126

# The largest sum of a row, and the largest bias, for which `int8_product_of_each` rounds to the right integer. Their unit is
# the scale of the row. In float32, (product - bias) / scale has an error of at most 3 * 2^-24 of the sum and 2^-24 of the
# bias, which is then less than half a unit.
LARGEST_SUM = LARGEST_BIAS = 2e6

# Steps between the smallest and the largest input of a product; the fewer on processors whose kernels would overflow.
MOST_STEPS, LEAST_STEPS = 255, 127
