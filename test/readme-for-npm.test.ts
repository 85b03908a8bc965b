import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { readmeForNpm, relativeTargets } from '../scripts/readme-for-npm.ts';

describe('the README of a release', () => {
  it('has every link whole, pictures by their bytes', () => {
    const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8');
    expect(relativeTargets(readme).length).toBeGreaterThan(10);
    const released = readmeForNpm(readme, 'https://example.com/owner/name', '1.2.3');
    expect(relativeTargets(released)).toEqual([]);
    expect(released).toContain('](https://example.com/owner/name/blob/v1.2.3/docs/integrations.md)');
    expect(released).toContain('srcset="https://example.com/owner/name/raw/v1.2.3/docs/images/demo-dark.svg"');
    expect(released.replaceAll(/https:\/\/example\.com\/owner\/name\/(blob|raw)\/v1\.2\.3\//g, '')).toBe(readme);
  });

  it('leaves links inside the page and to other hosts', () => {
    const text = '[a](#speed) [b](https://host/x.md) [c](mailto:a@b) <img src="//host/x.png"> [d](docs/x.md#part)';
    expect(relativeTargets(text)).toEqual(['docs/x.md#part']);
  });
});
