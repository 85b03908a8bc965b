/**
 * What kernels with FP4 QK and PV may lose on ordinary inputs: 0.17 on normal numbers, more where a row sees few keys.
 */
export const FP4_RELATIVE_L1 = 0.25;
