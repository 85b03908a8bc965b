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
  /** Of a call over tensors where the backend computes, output there too. */
  readonly medianMs?: number;
  /** Of a call from tensors in CPU memory to the output there; absent where that is where the backend computes. */
  readonly withCopiesMs?: number;
  readonly fastestMs?: number;
  /** 4 B H L^2 D / median, halved when causal. */
  readonly gflops?: number;
  readonly accuracy?: Accuracy;
  /** Query rows of each head that accuracy is of. */
  readonly rows?: number;
}

export interface BenchPeer extends InputShape {
  /** onnxruntime-web's float32 attention on WebAssembly, or exact attention of this package on the GPU. */
  readonly name: string;
  readonly isCausal?: boolean;
  /** Or why it failed. */
  readonly medianMs?: number;
  readonly failed?: string;
}

/** What `bench --json` writes. */
export interface BenchReport {
  readonly schema: 'sageattention-bench/2';
  readonly version: string;
  readonly date: string;
  readonly machine: Machine;
  readonly dtype: DType;
  readonly repetitions: number;
  readonly seed: number;
  readonly backends: Readonly<Record<string, Readonly<Record<string, string>>>>;
  readonly results: readonly BenchResult[];
  /** The same attention exactly: by onnxruntime-web where it is installed and has it, and on WebGPU where that is measured. */
  readonly peers: readonly BenchPeer[];
}
