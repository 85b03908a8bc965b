/** Attention in each exporter's spelling. */
import { testCases } from './testing/cases.ts';
import { EXPORTERS } from './testing/exporters/index.ts';

testCases(EXPORTERS);
