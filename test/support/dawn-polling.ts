/**
 * Dawn's binding for Node asks at every turn of the event loop, by `setImmediate`, whether what it waits for is done. While a software
 * driver compiles that keeps a processor busy, which the tests beside need. Here it asks every millisecond.
 */
globalThis.setImmediate = ((callback: (...values: unknown[]) => void, ...values: unknown[]) =>
  setTimeout(callback, 1, ...values)) as unknown as typeof setImmediate;
