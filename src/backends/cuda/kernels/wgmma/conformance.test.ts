/** The conformance suite on the Hopper kernels: the real backend and launches, kernels run by the simulator. */
import { describeKernels } from '../../testing/conformance.ts';

describeKernels(90, ({ family }) => family === 'wgmma');
