/** What `bench` measured, as `--json` writes it and `--html` draws it. */
import type { InputShape } from '../measure/inputs.ts';
import type { Machine } from '../measure/machine.ts';
import type { Accuracy, BackendName, DType, KernelName } from './library.ts';

export interface BenchResult extends InputShape {
  readonly backend: BackendName;
  readonly kernel: KernelName;
  readonly isCausal: boolean;
  /** Why there are no figures: the kernel does not take this problem. */
  readonly refused?: string;
  /** Why there are no figures: the kernel failed while it ran. */
  readonly failed?: string;
  readonly medianMs?: number;
  readonly fastestMs?: number;
  /** 4 B H L^2 D / median, halved when causal. */
  readonly gflops?: number;
  readonly accuracy?: Accuracy;
  /** Query rows of each head that accuracy is of. */
  readonly rows?: number;
}

export interface BenchPeer extends InputShape {
  readonly name: 'onnxruntime-web';
  /** Or why it failed. */
  readonly medianMs?: number;
  readonly failed?: string;
}

/** What `bench --json` writes. */
export interface BenchReport {
  readonly schema: 'sageattention-bench/1';
  readonly version: string;
  readonly date: string;
  readonly machine: Machine;
  readonly dtype: DType;
  readonly repetitions: number;
  readonly seed: number;
  readonly backends: Readonly<Record<string, Readonly<Record<string, string>>>>;
  readonly results: readonly BenchResult[];
  /** The same attention in float32 by onnxruntime-web on WebAssembly, where it is installed and has it. */
  readonly peers: readonly BenchPeer[];
}
