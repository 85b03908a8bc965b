/** The graphs of exporters that tests run and that the documentation's table is made of. */
import type { Case } from '../case.ts';
import { FUSED } from './fused.ts';
import { SINGLE_OPERATORS } from './single-operators.ts';
import { TEXT_AND_SPEECH } from './text-and-speech.ts';
import { VISION } from './vision.ts';

export const EXPORTERS: readonly Case[] = [...SINGLE_OPERATORS, ...VISION, ...TEXT_AND_SPEECH, ...FUSED];
