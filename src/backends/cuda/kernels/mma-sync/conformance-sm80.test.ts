import { describeSimulated } from '../../testing/conformance.ts';

describeSimulated(80, ['qk-int8-pv-fp16-cuda']);
