/** Streams, events and graphs of the fake driver. Work runs only when something waits for it. */
import { CUDA_ERROR_NOT_READY, type DriverFunctions } from '../../driver/api.ts';
import type { FakeContexts } from './contexts.ts';
import type { FakeHost, HostMemory } from './host.ts';

/** A fault of the device while it ran something. */
export class DeviceFault extends Error {
  readonly status: number;
  constructor(status: number) {
    super(`device fault ${status}`);
    this.status = status;
  }
}

/** What a stream does: work, or a wait for a point of another stream. */
type Operation = Work | { readonly after: Point };

interface Work {
  readonly run: () => void;
  /** Its node, where it was captured. */
  readonly node?: bigint;
  /** For kernels: the same launch with other parameters; `parameters` is the driver's struct. */
  readonly withParameters?: ((parameters: HostMemory) => (() => void) | number) | undefined;
}

interface Point {
  readonly stream: Stream;
  /** Operations of that stream that come before the point. */
  readonly count: number;
}

export interface Stream {
  readonly handle: bigint;
  readonly device: number;
  readonly operations: Operation[];
  done: number;
  capture: Work[] | undefined;
  /** The latest node of the capture, in memory of the driver's. */
  readonly latest: BigUint64Array<ArrayBuffer>;
  captureBroken: boolean;
  destroyed: boolean;
}

interface Event {
  point: Point | undefined;
  queries: number;
  readonly timing: boolean;
}

type StreamFunction =
  | Extract<keyof DriverFunctions, `cuStream${string}`>
  | Extract<keyof DriverFunctions, `cuEvent${string}`>;
type GraphFunction = Extract<keyof DriverFunctions, `cuGraph${string}`>;

export class FakeStreams {
  readonly #contexts: FakeContexts;
  readonly #host: FakeHost;
  readonly #streams = new Map<bigint, Stream>();
  readonly #events = new Map<bigint, Event>();
  readonly #graphs = new Map<bigint, readonly Work[]>();
  readonly #graphExecutables = new Map<bigint, Work[]>();

  constructor(contexts: FakeContexts, host: FakeHost) {
    this.#contexts = contexts;
    this.#host = host;
  }

  get live(): { readonly streams: number; readonly events: number; readonly graphs: number } {
    return {
      streams: [...this.#streams.values()].filter(({ destroyed }) => !destroyed).length,
      events: this.#events.size,
      graphs: this.#graphs.size + this.#graphExecutables.size,
    };
  }

  newStream(device: number): bigint {
    const handle = this.#contexts.newHandle();
    const operations: Operation[] = [];
    const latest = new BigUint64Array(1);
    const state = { operations, done: 0, capture: undefined, captureBroken: false, destroyed: false };
    this.#streams.set(handle, { handle, device, latest, ...state });
    return handle;
  }

  /** The stream of a handle, unless it was destroyed. */
  find(handle: bigint | number): Stream | undefined {
    const stream = this.#streams.get(BigInt(handle));
    return stream === undefined || stream.destroyed ? undefined : stream;
  }

  /** Runs all that a stream holds, as time passing would. */
  drain(stream: Stream): void {
    this.runUpTo({ stream, count: stream.operations.length });
  }

  drainAll(): void {
    for (const stream of this.#streams.values()) this.drain(stream);
  }

  /** Runs a stream up to a point; before each wait, first the work that it waits for. */
  runUpTo({ stream, count }: Point): void {
    const context = this.#contexts.of(stream.device);
    while (stream.done < count && context.fault === 0) {
      const operation = stream.operations[stream.done] as Operation;
      stream.done++;
      if ('after' in operation) {
        this.runUpTo(operation.after);
        continue;
      }
      try {
        operation.run();
      } catch (error) {
        if (!(error instanceof DeviceFault)) throw error;
        context.fault = error.status;
      }
    }
  }

  /** Puts work on a stream, or into the graph that it is captured into. */
  enqueue(handle: bigint | number, run: () => void, withParameters?: Work['withParameters']): number {
    const stream = this.find(handle);
    if (stream === undefined) return 400;
    if (stream.capture === undefined) stream.operations.push({ run });
    else {
      const node = this.#contexts.newHandle();
      stream.capture.push({ run, node, withParameters });
      stream.latest[0] = node;
    }
    return 0;
  }

  readonly functions: Pick<DriverFunctions, StreamFunction> = {
    cuStreamCreate: (stream, flags) => {
      if (flags !== 1) throw new Error('a stream that synchronizes with the default stream');
      this.#host.write64(stream, this.newStream(this.#contexts.currentDevice));
      return 0;
    },
    cuStreamDestroy: (handle) => {
      const stream = this.find(handle);
      if (stream === undefined) return 400;
      this.runUpTo({ stream, count: stream.operations.length });
      stream.destroyed = true;
      return 0;
    },
    cuStreamSynchronize: (handle) => {
      const stream = this.find(handle);
      if (stream === undefined) return 400;
      if (stream.capture !== undefined) {
        stream.captureBroken = true;
        return 900;
      }
      this.runUpTo({ stream, count: stream.operations.length });
      return this.#contexts.of(stream.device).fault;
    },
    cuStreamWaitEvent: (handle, eventHandle) => {
      const stream = this.find(handle);
      const event = this.#events.get(BigInt(eventHandle));
      if (stream === undefined || event === undefined) return 400;
      if (stream.capture !== undefined) {
        stream.captureBroken = true;
        return 905;
      }
      if (event.point !== undefined) stream.operations.push({ after: event.point });
      return 0;
    },
    cuStreamIsCapturing: (handle, status) => {
      const stream = this.find(handle);
      if (stream === undefined) return 400;
      this.#host.write32(status, stream.capture === undefined ? 0 : stream.captureBroken ? 2 : 1);
      return 0;
    },
    cuStreamBeginCapture: (handle) => {
      const stream = this.find(handle);
      if (stream === undefined) return 400;
      stream.capture = [];
      stream.captureBroken = false;
      return 0;
    },
    cuStreamGetCaptureInfo: (handle, status, id, graph, nodes, edges, count) => {
      const stream = this.find(handle);
      if (stream === undefined) return 400;
      this.#host.write32(status, stream.capture === undefined ? 0 : 1);
      for (const unused of [id, graph, edges]) this.#host.write64(unused, 0n);
      this.#host.write64(nodes, this.#host.addressOf(stream.latest.buffer));
      this.#host.write64(count, stream.capture === undefined || stream.capture.length === 0 ? 0n : 1n);
      return 0;
    },
    cuStreamEndCapture: (handle, graph) => {
      const stream = this.find(handle);
      if (stream?.capture === undefined) return 1;
      const operations = stream.capture;
      stream.capture = undefined;
      if (stream.captureBroken) return 901;
      const made = this.#contexts.newHandle();
      this.#graphs.set(made, operations);
      this.#host.write64(graph, made);
      return 0;
    },
    cuEventCreate: (event, flags) => {
      const handle = this.#contexts.newHandle();
      this.#events.set(handle, { point: undefined, queries: 0, timing: flags !== 2 });
      this.#host.write64(event, handle);
      return 0;
    },
    cuEventDestroy: (handle) => (this.#events.delete(BigInt(handle)) ? 0 : 400),
    cuEventRecord: (handle, streamHandle) => {
      const event = this.#events.get(BigInt(handle));
      const stream = this.find(streamHandle);
      if (event === undefined || stream === undefined) return 400;
      if (stream.capture !== undefined) return 900;
      event.point = { stream, count: stream.operations.length };
      event.queries = 0;
      return 0;
    },
    cuEventQuery: (handle) => {
      const event = this.#events.get(BigInt(handle));
      if (event === undefined) return 400;
      if (event.point === undefined) return 0;
      // Not ready at first, so that waiting is really done.
      if (event.queries++ < 2) return CUDA_ERROR_NOT_READY;
      this.runUpTo(event.point);
      return this.#contexts.of(event.point.stream.device).fault;
    },
    cuEventSynchronize: (handle) => {
      const event = this.#events.get(BigInt(handle));
      if (event === undefined) return 400;
      if (event.point === undefined) return 0;
      this.runUpTo(event.point);
      return this.#contexts.of(event.point.stream.device).fault;
    },
    cuEventElapsedTime: (milliseconds, start, end) => {
      const events = [start, end].map((handle) => this.#events.get(BigInt(handle)));
      if (events.some((event) => event === undefined || !event.timing)) return 400;
      this.#host.view(milliseconds, 4).setFloat32(0, 0.25, true);
      return 0;
    },
  };

  readonly graphFunctions: Pick<DriverFunctions, GraphFunction> = {
    cuGraphInstantiate: (executable, graph) => {
      const operations = this.#graphs.get(BigInt(graph));
      if (operations === undefined) return 400;
      const handle = this.#contexts.newHandle();
      this.#graphExecutables.set(handle, [...operations]);
      this.#host.write64(executable, handle);
      return 0;
    },
    cuGraphLaunch: (executable, handle) => {
      const operations = this.#graphExecutables.get(BigInt(executable));
      const stream = this.find(handle);
      if (operations === undefined || stream === undefined) return 400;
      stream.operations.push(...operations);
      return 0;
    },
    cuGraphExecKernelNodeSetParams: (executable, node, parameters) => {
      const operations = this.#graphExecutables.get(BigInt(executable));
      const at = operations?.findIndex((work) => work.node === BigInt(node)) ?? -1;
      const work = operations?.[at];
      if (operations === undefined || work?.withParameters === undefined) return 400;
      // As the driver: the node is one of the graph that was instantiated, which must still be there.
      if (![...this.#graphs.values()].some((graph) => graph.some((other) => other.node === work.node))) return 1;
      const run = work.withParameters(parameters);
      if (typeof run === 'number') return run;
      operations[at] = { ...work, run };
      return 0;
    },
    cuGraphExecDestroy: (executable) => (this.#graphExecutables.delete(BigInt(executable)) ? 0 : 400),
    cuGraphDestroy: (graph) => (this.#graphs.delete(BigInt(graph)) ? 0 : 400),
  };
}
