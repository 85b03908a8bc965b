import { describeSimulated } from '../../testing/conformance.ts';

describeSimulated(90, ['qk-int8-pv-fp8-cuda', 'qk-int4-pv-fp8-cuda']);
