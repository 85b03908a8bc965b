import { describe, expect, it } from 'vitest';
import { InvalidArgumentError } from '../errors.ts';
import { validateOptions } from './options.ts';

describe("perBlockMean, Python's name for smoothQ", () => {
  it('becomes smoothQ', () => {
    expect(validateOptions({ perBlockMean: true })).toEqual({ smoothQ: 'block' });
    expect(validateOptions({ perBlockMean: false, windowSize: [1, 2] })).toEqual({
      smoothQ: 'sequence',
      windowSize: [1, 2],
    });
  });

  it('is refused beside smoothQ, and anything but a boolean', () => {
    expect(() => validateOptions({ perBlockMean: true, smoothQ: 'block' })).toThrow(InvalidArgumentError);
    expect(() => validateOptions({ perBlockMean: 'block' as never })).toThrow(InvalidArgumentError);
    expect(() => validateOptions({ smoothQ: 'blocks' as never })).toThrow(InvalidArgumentError);
    expect(() => validateOptions({ scaleSearch: 'best' as never })).toThrow(InvalidArgumentError);
  });
});
