/** What every role of a CTA knows: parameters, shared memory, barriers. */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, type SharedTile } from '../../ptx/layouts.ts';
import { fenceMbarrierInit, mbarrierInit } from '../../ptx/mbarrier.ts';
import { fenceProxyAsync } from '../../ptx/tma.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { integers, pointers } from '../parts/addresses.ts';
import { type BandParameters, bandParameters } from '../parts/band.ts';
import { type BlockParameters, blockParameters, GROUP_KEYS } from '../parts/blocks.ts';
import { type JoinParameters, joinParameters } from '../parts/join.ts';
import { Ring } from '../parts/ring.ts';
import { type SoftcapParameters, softcapParameters } from '../parts/scores.ts';
import { type Sinks, sinkParameters } from '../parts/sinks.ts';
import { type SharedPlan, sharedPlanOf, type WgmmaConfig } from './config.ts';
import { uniform } from './instructions.ts';

/** Keys of a tile. K has one scale for each 64 keys. */
export const WGMMA_BLOCK_K = 128;

/** Bits of groups of keys in an entry of a list. */
export const groupBitsOf = ({ blocks }: Pick<WgmmaConfig, 'blocks'>): number =>
  blocks === 'whole rows' ? WGMMA_BLOCK_K / GROUP_KEYS : 0;
/** Rows of a consumer warpgroup. */
export const CONSUMER_ROWS = 64;

export const WGMMA_POINTERS = [
  'sequences',
  'query',
  'queryScale',
  'rowBias',
  'keyMean',
  'keyScale',
  'keyFaults',
  'keyExponents',
  'valueScale',
  'valueTileScale',
  'valueMean',
  'mask',
  'output',
  'lse',
] as const;
export const WGMMA_INTEGERS = [
  'queryHeads',
  'headsPerKeyHead',
  'queryTiles',
  'splits',
  'paddedQueries',
  'paddedKeys',
  'work',
  'headGroup',
] as const;
/** In bytes. `query` strides are of the caller's Q, which a kernel that quantizes it reads. */
export const WGMMA_STRIDES = [
  'queryBatch',
  'queryHead',
  'queryToken',
  'maskBatch',
  'maskHead',
  'maskQuery',
  'maskKey',
  'outputBatch',
  'outputHead',
  'outputToken',
  'lseBatch',
  'lseHead',
] as const;
export const WGMMA_MAPS = ['queryMap', 'keyMap', 'valueMap'] as const;

/** Of a stage of V: a byte for each of its tokens, 1 where it is not finite, and a word that says whether any is. */
export const INSPECTION_BYTES = WGMMA_BLOCK_K + 16;
/** Warps that look at V, each at as many of its tokens. */
export const INSPECTORS = 2;

export interface InspectionPlace {
  /** Offset of stage 0's barrier, whose phases are those of the ring of V. */
  readonly barrier: number;
  readonly records: SharedTile;
}

export interface Frame {
  readonly b: KernelBuilder;
  readonly config: WgmmaConfig;
  readonly plan: SharedPlan;
  readonly pointer: Readonly<Record<(typeof WGMMA_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof WGMMA_INTEGERS)[number], Parameter<'u32'>>>;
  readonly strides: Readonly<Record<(typeof WGMMA_STRIDES)[number], Parameter<'u64'>>>;
  readonly maps: readonly Parameter<'tensorMap'>[];
  readonly band: BandParameters;
  readonly smScale: Parameter<'f32'>;
  readonly softcap: SoftcapParameters;
  readonly sinks: Sinks | undefined;
  readonly join: JoinParameters | undefined;
  readonly blocks: BlockParameters | undefined;
  /** V and P are FP8. */
  readonly fp8: boolean;
  /** The kernel quantizes Q itself. */
  readonly fused: boolean;
  /** Q, K and V are the caller's, in 16 bits: nothing is quantized. */
  readonly exact: boolean;
  /**
   * Scores are finished in base 2 before the maximum is taken; otherwise they stay 1.5 * 2^23 + q . k, or q . k of
   * 16-bit operands, until the exponentials.
   */
  readonly scoresAreFloat: boolean;
  /** Rows of Q of the CTA. */
  readonly rows: number;
  readonly tiles: Readonly<Record<'query' | 'key' | 'value' | 'bias' | 'arrived', SharedTile>>;
  readonly bytes: {
    readonly keyStage: number;
    readonly valueStage: number;
    readonly queryBlock: number;
    readonly keyBlock: number;
  };
  readonly shared: Reg<'shared'>;
  readonly barriers: Reg<'shared'>;
  readonly keys: Ring;
  readonly values: Ring;
  /** Offsets of the barriers of Q's one stage. */
  readonly queryFull: number;
  readonly queryEmpty: number;
  /** What `inspector.ts` found in the stages of V; undefined unless {@link exact}. */
  readonly inspection: InspectionPlace | undefined;
  readonly thread: Reg<'u32'>;
  readonly warpgroup: Reg<'u32'>;
}

const REGISTERS_OF_MULTIPROCESSOR = 65_536;

/**
 * Warpgroups trade the registers that the CTA was given at its start, a multiple of 8 for each thread. If they ask for
 * more together, the last waits for ever.
 */
function requireRegisters({ consumers, registers, minBlocks }: WgmmaConfig): void {
  if (registers === undefined) return;
  const warpgroups = 1 + consumers;
  const ofThread = Math.floor(REGISTERS_OF_MULTIPROCESSOR / (128 * warpgroups * minBlocks * 8)) * 8;
  const asked = registers.producer + consumers * registers.consumer;
  if (asked > warpgroups * ofThread) {
    throw new RangeError(`${asked} registers for ${warpgroups} warpgroups that have ${ofThread} each`);
  }
}

/** Declares parameters and shared memory, and makes the barriers. */
export function makeFrame(config: WgmmaConfig): Frame {
  requireRegisters(config);
  const { consumers, stages } = config;
  const b = new KernelBuilder({
    name: 'wgmmaAttention',
    target: 'sm_90a',
    threads: 128 * (1 + consumers),
    minBlocksPerMultiprocessor: config.minBlocks,
  });
  const parameters = {
    pointer: pointers(b, WGMMA_POINTERS),
    integer: integers(b, WGMMA_INTEGERS),
    strides: pointers(b, WGMMA_STRIDES),
    band: bandParameters(b),
    smScale: b.parameter('smScale', 'f32'),
    softcap: softcapParameters(b),
    maps: WGMMA_MAPS.map((name) => b.parameter(name, 'tensorMap')),
    sinks: sinkParameters(b, config.sinks),
    join: config.joins ? joinParameters(b) : undefined,
    blocks: config.blocks === 'none' ? undefined : blockParameters(b),
  };

  b.section('shared memory');
  const plan = sharedPlanOf(config);
  const { rowLayout, rowBlocks } = plan;
  const rows = consumers * CONSUMER_ROWS;
  const tiles = {
    query: b.shared('query', rowBlocks * rows, rowLayout),
    key: b.shared('key', stages * rowBlocks * WGMMA_BLOCK_K, rowLayout),
    value: b.shared('value', stages * plan.valueStageRows, plan.valueLayout),
    bias: b.shared('row bias', 1, rowMajor(rows * 4)),
    arrived: b.shared('splits that have arrived', 1, rowMajor(16)),
  };
  const exact = config.qkFormat !== 's8';
  const barrierTile = b.shared('barriers', 1, rowMajor(8 * ((exact ? 5 : 4) * stages + 2)));
  const inspection = exact
    ? { barrier: 32 * stages + 16, records: b.shared('faults of V', stages, rowMajor(INSPECTION_BYTES)) }
    : undefined;
  const bytes = {
    keyStage: tiles.key.bytes / stages,
    valueStage: tiles.value.bytes / stages,
    queryBlock: rows * rowLayout.rowBytes,
    keyBlock: WGMMA_BLOCK_K * rowLayout.rowBytes,
  };
  const shared = b.sharedAddress();
  const barriers = b.add(shared, barrierTile.base);
  const keys = new Ring(b, { barriers, stages, full: 0, empty: 16 * stages });
  const values = new Ring(b, { barriers, stages, full: 8 * stages, empty: 24 * stages });
  const queryFull = 32 * stages;
  const queryEmpty = queryFull + 8;

  b.section('barriers');
  const thread = b.special('%tid.x');
  const warpgroup = uniform(b, b.shr(thread, 7));
  b.if(b.setp('eq', thread, 0), () => {
    for (let stage = 0; stage < stages; stage++) {
      for (const ring of [keys, values]) ring.initFull(stage);
      keys.initEmpty(stage, 4 * consumers);
      // The inspectors hand stages of V back too.
      values.initEmpty(stage, 4 * consumers + (exact ? INSPECTORS : 0));
      if (inspection !== undefined) mbarrierInit(b, barriers, INSPECTORS, inspection.barrier + 8 * stage);
    }
    mbarrierInit(b, barriers, 1, queryFull);
    mbarrierInit(b, barriers, 4 * consumers, queryEmpty);
    fenceMbarrierInit(b);
  });
  const floatMask = config.mask !== 'none' && config.mask !== 'boolean';
  return {
    ...{ b, config, plan, ...parameters },
    ...{ fp8: config.pvFormat === 'e4m3', fused: config.fusedQuery !== undefined, exact, inspection },
    ...{ scoresAreFloat: config.softcap || floatMask || config.scalesFirst, rows, tiles, bytes },
    ...{ shared, barriers, keys, values, queryFull, queryEmpty, thread, warpgroup },
  };
}

/**
 * Behind the channels of V's tiles: one row of ones, whose product with P is the sum of P's rows, and seven of zeros.
 */
export function writeOnes({ b, config, tiles, bytes, shared, thread }: Frame): void {
  b.section('ones behind V');
  b.if(b.setp('lt', thread, 64), () => {
    // 64 chunks of 16 bytes, the first row's eight full of 1.0 in E4M3.
    const first = b.setp('lt', thread, 8);
    const ones = b.selp<'b32'>(0x38383838, b.constant('b32', 0), first);
    const chunk = b.add(shared, b.as(b.shl(thread, 4), 'shared'));
    for (let stage = 0; stage < config.stages; stage++) {
      const behindChannels = tiles.value.base + stage * bytes.valueStage + config.paddedValueDim * 128;
      b.stVector([ones, ones, ones, ones], chunk, behindChannels);
    }
    fenceProxyAsync(b);
  });
}
