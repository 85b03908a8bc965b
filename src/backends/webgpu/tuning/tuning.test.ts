/** Records of tuning, their stores, and what they do to choices: pure, or on files. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { runSeed } from '../../../../test/support/random.ts';
import { createProblem } from '../../../attention/problem.ts';
import { tensor } from '../../../tensor/tensor.ts';
import { chooseOptions } from '../../choice.ts';
import { createWebgpuBackend } from '../backend.ts';
import { type Capabilities, capabilitiesOf } from '../capabilities.ts';
import { candidatesFor, chooseVariant, keyValueLayoutOf } from '../families/choose.ts';
import { QK_INT8_PV_FP16, QK_INT8_PV_INT8 } from '../kernel-table.ts';
import { H200 } from '../testing/configurations.ts';
import { entryFor, joined, kindOf, parseTuning, type TunedEntry, tuningOf, tuningText } from './record.ts';
import { fileStore, readTuning, writeTuning } from './store.ts';
import { tune } from './tune.ts';

const seed = runSeed();

const CAPABILITIES: Capabilities = {
  ...capabilitiesOf(
    {
      features: new Set(['shader-f16', 'subgroups']),
      limits: {
        maxComputeWorkgroupStorageSize: 49152,
        maxComputeInvocationsPerWorkgroup: 1024,
        maxComputeWorkgroupSizeX: 1024,
      },
    } as unknown as GPUDevice,
    { description: 'a GPU', subgroupMinSize: 32, subgroupMaxSize: 32 } as GPUAdapterInfo,
    new Set(['packed_4x8_integer_dot_product', 'subgroup_id']),
  ),
  matrixConfigs: H200,
  matrixFeature: 'chromium-experimental-subgroup-matrix',
};

const problemOf = (queries: number, headDim: number) => {
  const data = (tokens: number) => tensor(new Float32Array(tokens * headDim), [1, 1, tokens, headDim]);
  return createProblem(data(queries), data(40), data(40), {});
};

const entryOf = (times: TunedEntry['times'], queries = 100, headDim = 64): TunedEntry => ({
  ...kindOf({ queryLength: queries, headDim, valueDim: headDim }),
  measured: { heads: 1, queries, keys: 100 },
  table: { family: 'matrix', variant: '4s64r32k-qk2-pv1' },
  times,
});

const choiceOf = (problem = problemOf(100, 64)) => chooseOptions(QK_INT8_PV_FP16, problem, {});
const SUBGROUP = { kernel: QK_INT8_PV_FP16.name, family: 'subgroup', variant: '32x32', milliseconds: 0.5 } as const;

describe('a record', () => {
  it('comes back as it was written, and for no other version, device or engine', () => {
    const tuning = tuningOf('a GPU', 'Node 1', [entryOf([SUBGROUP])]);
    const text = JSON.stringify(tuning);
    expect(parseTuning(text, 'a GPU', 'Node 1')).toEqual(tuning);
    expect(parseTuning(text, 'another', 'Node 1')).toBeUndefined();
    expect(parseTuning(text, 'a GPU', 'Node 2')).toBeUndefined();
    expect(parseTuning(JSON.stringify({ ...tuning, version: '0.0.1' }), 'a GPU', 'Node 1')).toBeUndefined();
    expect(tuningText(tuning)).toMatch(/D 64, up to 1024 queries: qk-int8-pv-fp16 subgroup 32x32 0.500 ms/);
  });

  it('that is none is none, whatever it is', () => {
    const good = tuningOf('a', 'b', [entryOf([SUBGROUP])]);
    const broken = fc
      .tuple(fc.constantFrom('entries', 'times', 'entry', 'time', 'text'), fc.jsonValue(), fc.string())
      .map(([part, value, text]) => {
        const entry = good.entries[0] as TunedEntry;
        if (part === 'text') return text;
        if (part === 'entries') return JSON.stringify({ ...good, entries: value });
        if (part === 'entry') return JSON.stringify({ ...good, entries: [value] });
        const times = part === 'times' ? value : [value];
        return JSON.stringify({ ...good, entries: [{ ...entry, times }] });
      });
    fc.assert(
      fc.property(broken, (text) => {
        const parsed = parseTuning(text, 'a', 'b');
        // An empty list is a record that prefers nothing.
        expect((parsed?.entries ?? []).every(({ times }) => times.length === 0)).toBe(true);
      }),
      { seed },
    );
  });

  it('has one entry for a kind', () => {
    const [first, second, other] = [entryOf([SUBGROUP]), entryOf([]), entryOf([], 2000)];
    expect(joined([first, other], [second])).toEqual([other, second]);
    expect(entryFor([first, other], { queryLength: 1024, headDim: 33, valueDim: 64 })).toBe(first);
    expect(entryFor([first, other], { queryLength: 32, headDim: 64, valueDim: 64 })).toBeUndefined();
    expect(entryFor([first, other], { queryLength: 100, headDim: 64, valueDim: 65 })).toBeUndefined();
  });
});

describe('a store', () => {
  const folder = mkdtempSync(join(tmpdir(), 'tuning-'));
  afterAll(() => rmSync(folder, { recursive: true }));

  it('keeps records by name in a file', async () => {
    const store = fileStore(join(folder, 'new'));
    expect(await readTuning('one', store)).toBeUndefined();
    expect(await writeTuning('one', '1', store)).toBe(true);
    expect(await writeTuning('two', '2', store)).toBe(true);
    expect([await readTuning('one', store), await readTuning('two', store)]).toEqual(['1', '2']);
  });

  it('that is broken or cannot be written keeps nothing and stops nobody', async () => {
    writeFileSync(join(folder, 'webgpu-tuning.json'), '{"one": 1, ');
    expect(await readTuning('one', fileStore(folder))).toBeUndefined();
    expect(await writeTuning('one', '1', fileStore(join(folder, 'webgpu-tuning.json', 'under-a-file')))).toBe(false);
    expect(await writeTuning('one', '1', fileStore(folder))).toBe(true);
    expect(JSON.parse(readFileSync(join(folder, 'webgpu-tuning.json'), 'utf8'))).toEqual({ one: '1' });
  });
});

describe('what was measured', () => {
  const problem = problemOf(100, 64);
  const tuned = (...times: TunedEntry['times']): Capabilities => ({ ...CAPABILITIES, tuning: [entryOf(times)] });

  it('is preferred to the table, for problems of its kind', () => {
    const chosen = chooseVariant(tuned(SUBGROUP), problem, choiceOf(), {});
    expect([chosen.family, chosen.name]).toEqual(['subgroup', '32x32']);
    expect(keyValueLayoutOf(tuned(SUBGROUP), problem, choiceOf(), {})).toBe('rows');
    expect(chooseVariant(tuned(SUBGROUP), problemOf(20, 64), choiceOf(), {}).family).toBe('matrix');
    expect(chooseVariant(tuned(SUBGROUP), problem, choiceOf(), { family: 'base' }).family).toBe('base');
  });

  it('and is not there, or does not fit, is passed over', () => {
    const gone = { ...SUBGROUP, variant: '1x1' } as const;
    const large = { ...SUBGROUP, variant: '64x32' } as const;
    const small = { ...tuned(gone, large, SUBGROUP), workgroupBytes: 16384, matrixConfigs: [] };
    expect(chooseVariant(tuned(gone, SUBGROUP), problem, choiceOf(), {}).name).toBe('32x32');
    expect(chooseVariant(small, problem, choiceOf(), {})).toMatchObject({ family: 'subgroup' });
    expect(chooseVariant(tuned(gone), problem, choiceOf(), {}).family).toBe('matrix');
    expect(chooseVariant({ ...tuned(SUBGROUP), subgroups: false }, problem, choiceOf(), {}).family).toBe('base');
  });

  it('does not read keys in a layout that they are not in', () => {
    expect(chooseVariant(tuned(SUBGROUP), problem, choiceOf(), {}, 'tiles').family).toBe('matrix');
    const matrix = { ...SUBGROUP, family: 'matrix', variant: '4s64r32k-qk2-pv1' } as const;
    expect(chooseVariant(tuned(matrix), problem, choiceOf(), {}, 'rows').family).toBe('subgroup');
  });

  it('is of the first variants of each family, and of one that every better device has only without it', () => {
    const families = (capabilities: Capabilities, kernel = QK_INT8_PV_FP16) => {
      const found = candidatesFor(capabilities, problem, chooseOptions(kernel, problem, {}));
      return [...new Set(found.map(({ family }) => family))];
    };
    expect(families(CAPABILITIES)).toEqual(['matrix', 'subgroup']);
    expect(families(CAPABILITIES, QK_INT8_PV_INT8)).toEqual(['subgroup']);
    expect(families({ ...CAPABILITIES, subgroups: false })).toEqual(['base']);
  });
});

describe('bad input', () => {
  it('is named', async () => {
    expect(() => createWebgpuBackend({ tune: 'always' as 'auto' })).toThrow(/options.tune.*'auto', 'off' or 'now'/);
    const device = {} as GPUDevice;
    const shape = { headDim: 64, queries: 1, keys: 1, heads: 1 };
    await expect(tune(device, [{ ...shape, keys: 0.5 }])).rejects.toThrow(/shapes\[0\].keys/);
    await expect(tune(device, [{ ...shape, headDim: 1000 }])).rejects.toThrow(/shapes\[0\]/);
  });
});
