/** Charts as SVG text, drawn without a browser. */
import * as Plot from '@observablehq/plot';
import { parseHTML } from 'linkedom';

/** An `svg` element. Colours of text and rules are `currentColor`, so that a page's light or dark style applies. */
export function chart(options: Plot.PlotOptions): string {
  const { document } = parseHTML('<!doctype html><html><body></body></html>');
  const element = Plot.plot({
    document: document as unknown as Document,
    style: { background: 'transparent', color: 'currentColor', fontSize: '12px', overflow: 'visible' },
    ...options,
  });
  element.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  return element.outerHTML;
}

export { Plot };
