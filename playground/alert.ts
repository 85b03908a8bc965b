/** What goes wrong behind the page's back: a lost GPU, a worker that did not start. */
import * as Comlink from 'comlink';
import { byId, h } from './dom.ts';

/** Shows something that went wrong until it is dismissed. */
export function warn(text: string): void {
  const alert = byId('alert');
  const dismiss = h('button', { type: 'button', class: 'plain' }, 'Dismiss');
  dismiss.addEventListener('click', () => {
    alert.hidden = true;
  });
  alert.replaceChildren(h('span', {}, text), dismiss);
  alert.hidden = false;
}

/** A worker's interface. One that cannot start would leave every call to it waiting without a word. */
export function connect<T>(worker: Worker): Comlink.Remote<T> {
  worker.addEventListener('error', ({ message }) =>
    warn(
      `A worker of this page failed${message ? `: ${message}` : ': its script could not be loaded'}. Reload the page to try again.`,
    ),
  );
  return Comlink.wrap<T>(worker);
}
