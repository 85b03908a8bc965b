import { describeSimulated } from '../../testing/conformance.ts';

describeSimulated(89, ['qk-int8-pv-fp8-cuda', 'qk-int4-pv-fp8-cuda']);
