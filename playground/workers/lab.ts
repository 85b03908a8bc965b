/** The worker of section 2: keeps the head that is looked at, and computes what is drawn of it. */
import * as Comlink from 'comlink';
import {
  type Distribution,
  drawHead,
  type Head,
  type OutputError,
  outputErrors,
  type Picture,
  picture,
  type Quantization,
} from '../lab.ts';

let head: Head | undefined;
/** Counts changes, so that errors of a head that is no longer looked at are given up. */
let version = 0;

const api = {
  draw(distribution: Distribution): void {
    head = drawHead(distribution);
    version++;
  },

  take(next: Head): void {
    head = next;
    version++;
  },

  picture(quantization: Quantization): Picture {
    if (head === undefined) throw new Error('nothing to draw yet');
    return picture(head, quantization);
  },

  /** The errors, or undefined when the head was changed meanwhile. */
  async errors(): Promise<readonly OutputError[] | undefined> {
    if (head === undefined) return undefined;
    const started = version;
    const errors: OutputError[] = [];
    for (const error of outputErrors(head)) {
      errors.push(error);
      await new Promise((resolve) => setTimeout(resolve));
      if (version !== started) return undefined;
    }
    return errors;
  },
};

export type LabApi = typeof api;
Comlink.expose(api);
