/** The kernel of 16-bit operands on Hopper: the conformance suite, on wgmma where its copies take the operands as they lie. */
import { describeKernels } from '../../testing/conformance.ts';

describeKernels(90, ({ name }) => name === 'exact');
