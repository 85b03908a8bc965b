/**
 * What the page shows, in its address: a link to it shows the same. Only choices from lists and numbers are kept there; what someone
 * types is not.
 */

/** Safari refuses more than a hundred changes in half a minute, and a slider that moves makes sixty a second. */
const DELAY_MS = 300;

const pending = new Map<string, string | undefined>();
let timer: ReturnType<typeof setTimeout> | undefined;

function write(): void {
  timer = undefined;
  const address = new URL(location.href);
  for (const [key, value] of pending) {
    if (value === undefined) address.searchParams.delete(key);
    else address.searchParams.set(key, value);
  }
  pending.clear();
  history.replaceState(history.state, '', address);
}

/** The value of a choice when the page was opened: the address's where that is one of those allowed. */
export function fromAddress(key: string | undefined, initial: string, isAllowed: (value: string) => boolean): string {
  const found = key === undefined ? null : new URLSearchParams(location.search).get(key);
  return found !== null && isAllowed(found) ? found : initial;
}

/** Keeps a choice in the address; one that is as it was at first is left out. */
export function toAddress(key: string | undefined, value: string, initial: string): void {
  if (key === undefined) return;
  pending.set(key, value === initial ? undefined : value);
  timer ??= setTimeout(write, DELAY_MS);
}

/** The address with every change in it. */
export function currentAddress(): string {
  if (timer !== undefined) {
    clearTimeout(timer);
    write();
  }
  return location.href;
}
