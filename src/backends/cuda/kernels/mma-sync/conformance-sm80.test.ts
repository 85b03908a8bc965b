import { describeSimulated } from '../../testing/conformance.ts';

describeSimulated(80);
