/** The kernel of 16-bit operands on mma.sync: the conformance suite on a device of the lowest capability. */
import { describeKernels } from '../../testing/conformance.ts';

describeKernels(80, ({ name }) => name === 'exact');
