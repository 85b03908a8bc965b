import { describeSimulated } from '../../testing/conformance.ts';

// sm_90a has no FP8 in mma.sync and emulates INT4: the kernels of 8.9 take other ways there.
describeSimulated(90, 89);
