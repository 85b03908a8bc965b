/** The little that this page needs of a view library. */

type Child = Node | string | number | null | undefined | false;
type Attributes = Readonly<Record<string, string | number | boolean | EventListener | undefined>>;

/** A new element. Attributes that start with `on` are listeners; `true` is an empty attribute, `false` none. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: readonly (Child | readonly Child[])[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (typeof value === 'function') element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : String(value));
  }
  for (const child of children.flat() as Child[]) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** An element of `index.html`. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no element #${id}`);
  return element as T;
}

export const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** A line for the user; empty clears it. */
export function say(element: HTMLElement, text: string, bad = false): void {
  element.textContent = text;
  element.classList.toggle('bad', bad);
}

const exclusive = new Set<HTMLButtonElement>();
let working = false;

/**
 * A button whose work takes the whole device. While the work of one lasts none of them can be pressed: what runs beside a
 * measurement is measured with it.
 *
 * @param stop a button that can be pressed while the work lasts, and what it does
 */
export function exclusively(
  button: HTMLButtonElement,
  work: () => Promise<void>,
  stop?: { readonly button: HTMLButtonElement; readonly press: () => void },
): void {
  const lock = (on: boolean) => {
    working = on;
    for (const each of exclusive) each.disabled = on;
  };
  exclusive.add(button);
  button.disabled = working;
  stop?.button.addEventListener('click', () => {
    stop.button.disabled = true;
    stop.press();
  });
  button.addEventListener('click', async () => {
    lock(true);
    if (stop !== undefined) {
      stop.button.disabled = false;
      stop.button.focus();
    }
    try {
      await work();
    } finally {
      if (stop !== undefined) {
        if (document.activeElement === stop.button) stop.button.blur();
        stop.button.disabled = true;
      }
      lock(false);
      // A button that is disabled loses the focus; one who has gone elsewhere meanwhile is left there.
      if (document.activeElement === document.body) button.focus({ preventScroll: true });
    }
  });
}

/** A line that changes many times a second is read out once it has come to rest. */
export function saySteadily(element: HTMLElement, changing: boolean): void {
  element.setAttribute('aria-busy', String(changing));
}

/** Runs `work` at most once a frame, with what was asked for last; while one run lasts, the next waits for its end. */
export function latest<T>(work: (input: T) => Promise<void>): (input: T) => void {
  let waiting: { input: T } | undefined;
  let busy = false;
  const next = async () => {
    const job = waiting;
    waiting = undefined;
    if (job === undefined) {
      busy = false;
      return;
    }
    try {
      await work(job.input);
    } finally {
      requestAnimationFrame(() => void next());
    }
  };
  return (input) => {
    waiting = { input };
    if (busy) return;
    busy = true;
    requestAnimationFrame(() => void next());
  };
}

interface Option<T extends string> {
  readonly value: T;
  readonly label: string;
}

export interface Control<T> {
  readonly element: HTMLElement;
  readonly value: T;
}

let fields = 0;

/** A drop-down list. */
export function selectField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: T,
  onChange: () => void,
): Control<T> & { setOptions(options: readonly Option<T>[]): void } {
  const id = `field-${fields++}`;
  const select = h('select', { id, onchange: onChange });
  const setOptions = (next: readonly Option<T>[]) => {
    const before = select.value;
    select.replaceChildren(...next.map(({ value, label }) => h('option', { value }, label)));
    select.value = next.some(({ value }) => value === before) ? before : (next[0]?.value ?? '');
  };
  setOptions(options);
  select.value = initial;
  return {
    element: h('div', { class: 'field' }, h('label', { for: id }, name), select),
    get value() {
      return select.value as T;
    },
    setOptions,
  };
}

/** A slider that shows its value. */
export function rangeField(
  name: string,
  { min, max, step, initial }: { min: number; max: number; step: number; initial: number },
  onInput: () => void,
): Control<number> & { enable(on: boolean): void } {
  const id = `field-${fields++}`;
  const shown = h('output', { for: id }, String(initial));
  const input = h('input', {
    id,
    type: 'range',
    min,
    max,
    step,
    value: initial,
    oninput: () => {
      shown.textContent = input.value;
      onInput();
    },
  });
  return {
    element: h('div', { class: 'field' }, h('label', { for: id }, `${name} `, shown), input),
    get value() {
      return Number(input.value);
    },
    enable(on) {
      input.disabled = !on;
    },
  };
}

/** One of a few, all of them in sight. */
export function radioField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: T,
  onChange: () => void,
): Control<T> {
  const group = `field-${fields++}`;
  const inputs = options.map(({ value }) =>
    h('input', { type: 'radio', name: group, value, checked: value === initial, onchange: onChange }),
  );
  return {
    element: h(
      'fieldset',
      { class: 'field' },
      h('legend', {}, name),
      h(
        'div',
        { class: 'choices' },
        options.map(({ label }, i) => h('label', {}, inputs[i], label)),
      ),
    ),
    get value() {
      return (inputs.find(({ checked }) => checked)?.value ?? initial) as T;
    },
  };
}

/** Any of a few. */
export function checkField<T extends string>(
  name: string,
  options: readonly Option<T>[],
  initial: readonly T[],
  onChange: () => void,
): Control<readonly T[]> {
  const inputs = options.map(({ value }) =>
    h('input', { type: 'checkbox', value, checked: initial.includes(value), onchange: onChange }),
  );
  return {
    element: h(
      'fieldset',
      { class: 'field' },
      h('legend', {}, name),
      h(
        'div',
        { class: 'choices' },
        options.map(({ label }, i) => h('label', {}, inputs[i], label)),
      ),
    ),
    get value() {
      return inputs.filter(({ checked }) => checked).map(({ value }) => value as T);
    },
  };
}
